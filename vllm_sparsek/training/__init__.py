"""What scorers are trained with."""
