"""What a run shows: TensorBoard, the console and plots."""
