"""What the commands and both adapters share: errors, files, the console, images, settings."""
