"""The plan, the chunks, the step."""
