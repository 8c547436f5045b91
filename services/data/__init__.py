"""Demonstrations and questions, prompts, the tokenizer, the schedule. Imports base, config and records; no ray."""
