"""What a save costs a training on a GPU: each contender in a fresh process, beside the same window without a save."""
