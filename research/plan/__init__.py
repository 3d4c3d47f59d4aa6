"""What a mesh costs before it runs: memory, traffic, time; compiled for devices that needn't be there."""
