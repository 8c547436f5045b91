"""Graders of replies: rules and judges. Imports data and below."""
