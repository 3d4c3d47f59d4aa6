"""Ways to quantize one foundation, side by side: trained with one budget, judged on the same held-out documents."""
