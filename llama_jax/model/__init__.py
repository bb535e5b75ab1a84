"""The model: rotary embedding, attention, cache, layers, LLaMA. One forward pass for training and
decoding.
"""
