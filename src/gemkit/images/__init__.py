"""Pictures, and what is found in them. Never imports torch."""
