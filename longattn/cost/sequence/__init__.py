"""What each strategy of sequence parallelism sends, computes and waits for, by formula."""
