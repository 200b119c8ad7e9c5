"""The offline stage, on a server: trainable backbones, pre-training, evaluation. Needs PyTorch."""
