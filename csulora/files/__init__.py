"""Disk and foreign formats: safetensors, JSON, whole folders, PEFT, checkpoints, hub ids."""
