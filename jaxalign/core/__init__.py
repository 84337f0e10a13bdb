"""What every room stands on: config, files, devices, errors."""
