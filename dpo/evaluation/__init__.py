"""What a trained policy achieved: measures with intervals."""
