"""What attention and models cost: counted by formula, measured, and reported."""
