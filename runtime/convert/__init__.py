"""`llmc convert`: checkpoints of other formats become Hugging Face directories with safetensors."""
