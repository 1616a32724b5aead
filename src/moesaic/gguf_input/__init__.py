"""What a GGUF file holds, as a Hugging Face checkpoint says it: header, config and tensors. No torch here."""
