"""Private torch API, and nothing else: the one place to check when a torch release moves something. One module for each subject;
none imports other parts of dorafx."""
