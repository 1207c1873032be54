"""What a user can say: `MaskConfig`, its checks, and the model card."""
