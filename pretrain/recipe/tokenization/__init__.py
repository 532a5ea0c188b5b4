"""Text to ids: stages 03 and 04."""
