"""GGUF files: read into Transformers' form, and written for llama.cpp. Read `reader.py` first."""
