// After everything was withdrawn: the conversation that this tab kept for a reload goes too.
sessionStorage.clear();
