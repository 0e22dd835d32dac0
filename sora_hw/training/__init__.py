"""One readable fine-tuning run on the Trainer of transformers and DeepSpeed ZeRO."""
