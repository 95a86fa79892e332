"""What thousands of ranks cost: the product's planning and merging with made-up ranks, and real ones on one host."""
