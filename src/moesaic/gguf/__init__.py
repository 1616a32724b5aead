"""Writing a stock folder as one GGUF file, which llama.cpp and what is built on it load."""

DTYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k")
"""Types of a file, as llama.cpp names them; ``mixtures.py`` says what each is."""
PACKED_BY_LLAMA_CPP = DTYPES[4:]
"""These need llama.cpp's own quantiser."""
