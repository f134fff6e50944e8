"""Schedules requests and speaks the OpenAI protocol. Read `engine.py` first."""
