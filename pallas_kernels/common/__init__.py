"""What every kernel family stands on: Pallas, dispatch, packed documents, checks of arguments."""
