"""Instruction pairs, dialogues, preferences and questions: stages 11 and 13."""
