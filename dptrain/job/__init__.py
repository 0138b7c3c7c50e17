"""What is to be trained: the job file, checked, and what it is called by."""
