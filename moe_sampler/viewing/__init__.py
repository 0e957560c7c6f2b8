"""Pictures of images and of plans: PNGs with their settings, sheets, traces, figures, tables."""
