"""Checkpoints in and out: Hugging Face folders, GGUF files, our Orbax folder, tokenizers."""
