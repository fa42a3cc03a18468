"""Flags of recipes that end in seconds."""

FAST = (
    "--smoke --learning_rate 1e-2 --lr_warmup_steps 0 --ema_half_life 16 --ema_ramp None --ema_width None "
    "--checkpointing_steps 1 --validation_images 4"
)
