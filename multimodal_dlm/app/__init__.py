"""The demo page: tasks that show their denoising, and the page over them (extra `ui`)."""
