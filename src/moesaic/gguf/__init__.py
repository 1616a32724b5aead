"""Writing a stock folder as one GGUF file, which llama.cpp and what is built on it load."""
