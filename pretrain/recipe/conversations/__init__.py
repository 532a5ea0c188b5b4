"""Instruction pairs, dialogues and preferences: stages 11 and 13."""
