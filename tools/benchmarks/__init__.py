"""What the benchmark tools share: measuring, peers, statistics, output."""
