"""Where networks come from, one file each: timm, torchvision, a hub, open_clip, and Python files of one's own."""
