"""Numbers and text out of a model: stages 06, 07, 14, 15 and the chat."""
