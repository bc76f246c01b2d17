"""Private torch API, and nothing else: one place to look when a torch release moves something. A module a subject; none imports
anything else of dorafx."""
