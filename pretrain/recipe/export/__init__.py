"""What is taken away: model card, GGUF, Megatron-LM, the report page."""
