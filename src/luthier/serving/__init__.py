"""Answers requests for many tuned models on one base, over OpenAI's protocol.

Reading order: `detokenizer.py` (tokens to text), `engine.py` (the thread that owns the model), `openai_protocol.py`
(requests, responses, errors), `openai_serving.py` (requests to responses), `http_server.py` (HTTP).
"""
