"""Graders of answers, rules and judges. Imports data and below."""
