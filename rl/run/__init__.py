"""Around a training: files, callbacks, logs, plots, films and the command line."""
