"""Seeded mutations of messages, sent to real servers at work. A sample of them is in the tests, all are a command."""
