"""What a person sees of runs, from the files in their folders."""
