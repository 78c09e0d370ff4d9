"""Base models, the fast forward, LoRA and adapter directories. The only room that knows mlx-vlm."""
