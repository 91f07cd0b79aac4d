"""Convert checkpoints to virtual ranks and back, without model code."""
