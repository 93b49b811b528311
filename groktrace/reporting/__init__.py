"""TensorBoard, figures and the console."""
