"""What goes in: records (LongVALE, speech corpora), decoded audio and frames, and batches of them."""
