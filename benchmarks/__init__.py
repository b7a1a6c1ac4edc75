"""What comes out: metrics, timings and the tables made of them."""
