"""Reading: a checkpoint is opened, and its verified bytes go to where they are wanted."""
