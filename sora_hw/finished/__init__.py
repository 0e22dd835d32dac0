"""What is done with a finished run: scored, asked, looked into, shown, made fit for others. One file for each."""
