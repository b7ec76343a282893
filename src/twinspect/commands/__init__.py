"""What the commands do, one file each; `twinspect.cli` reads their options."""
